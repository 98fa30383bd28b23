"""Capture the real activations that ``flowroutes bench`` measures (it does so itself when they are missing)."""

from flowroutes_fast.bench.layers import save_activations
from flowroutes_fast.loading.load import cache_folder

if __name__ == "__main__":
    path = cache_folder() / "activations" / "smollm2.safetensors"
    save_activations(path)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.0f} MB)")
