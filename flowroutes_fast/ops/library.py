"""Where operations are registered with PyTorch: each file of an operation defines its own."""

import torch

library = torch.library.Library("flowroutes", "DEF")
