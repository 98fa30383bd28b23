"""GPU kernels, one file each. Installed as ``flowroutes_fast.kernels``."""
