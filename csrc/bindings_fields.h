// Fields of a parameter struct from a dict's entries of the same names. An entry that is missing or that no field asked
// for is an error: a typo must not become a null pointer. Names are made into Python's strings once: a check of every
// layer asks for some forty.
#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace flowroutes {

using Names = std::vector<PyObject*>;  // of one operation, in the order in which it asks for them

class Fields {
  public:
    Fields(const pybind11::dict& d, Names& names) : d_(d), names_(names) {}
    template <class F>
    Fields& operator()(const char* name, F& field) {
        if (!take(name, field)) throw std::invalid_argument(std::string("entry '") + name + "' is missing");
        return *this;
    }
    template <class F>
    Fields& optional(const char* name, F& field) {
        take(name, field);
        return *this;
    }
    void done() const {
        if (used_ != d_.size())
            throw std::invalid_argument("unknown entry in " + pybind11::repr(d_).cast<std::string>());
    }

  private:
    template <class F>
    bool take(const char* name, F& field) {
        if (asked_ == names_.size()) names_.push_back(PyUnicode_InternFromString(name));
        PyObject* const found = PyDict_GetItemWithError(d_.ptr(), names_[asked_++]);
        if (!found) {
            if (PyErr_Occurred()) throw pybind11::error_already_set();
            return false;
        }
        const pybind11::handle value(found);
        ++used_;
        if constexpr (std::is_pointer_v<F>) field = reinterpret_cast<F>(value.cast<uintptr_t>());
        else if constexpr (std::is_enum_v<F>) field = static_cast<F>(value.cast<int>());
        else field = value.cast<F>();
        if constexpr (std::is_floating_point_v<F>) {
            const bool finite = !std::strcmp(name, "scale") || !std::strcmp(name, "softcap");
            if (std::isnan(field) || (finite && std::isinf(field)))
                throw std::invalid_argument(std::string(name) + " must be a " + (finite ? "finite " : "") +
                                            "number, got " + pybind11::str(value).cast<std::string>());
        }
        return true;
    }

    const pybind11::dict& d_;
    Names& names_;
    size_t asked_ = 0, used_ = 0;
};

}  // namespace flowroutes
