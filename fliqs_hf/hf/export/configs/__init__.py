"""An allocation in the terms of libraries that quantize the original model themselves: torchao, ModelOpt."""
