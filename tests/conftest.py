import warnings

import torch

# Tiny models: more threads only wait for each other.
torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=DeprecationWarning, module="transformer_lens")
