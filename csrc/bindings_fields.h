// Fields of a parameter struct from a dict's entries of the same names. An entry that is missing or that no field asked for is an error:
// a typo must not become a null pointer.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace flowroutes {

class Fields {
  public:
    explicit Fields(const pybind11::dict& d) : d_(d) {}
    template <class F>
    Fields& operator()(const char* name, F& field) {
        if (!d_.contains(name)) throw std::invalid_argument(std::string("entry '") + name + "' is missing");
        return optional(name, field);
    }
    template <class F>
    Fields& optional(const char* name, F& field) {
        if (!d_.contains(name)) return *this;
        ++used_;
        if constexpr (std::is_pointer_v<F>)
            field = reinterpret_cast<F>(d_[name].template cast<uintptr_t>());
        else if constexpr (std::is_enum_v<F>)
            field = static_cast<F>(d_[name].template cast<int>());
        else
            field = d_[name].template cast<F>();
        return *this;
    }
    void done() const {
        if (used_ != d_.size()) throw std::invalid_argument("unknown entry in " + pybind11::repr(d_).cast<std::string>());
    }

  private:
    const pybind11::dict& d_;
    size_t used_ = 0;
};

}  // namespace flowroutes
