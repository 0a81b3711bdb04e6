"""GPU kernels in Pallas: plain arrays in, plain arrays out; they know nothing of the library that calls them.

`lut_product.lut_product` is the product. It runs on one of five kernels in two flavours, Pallas-Triton (`triton_*`) and
Mosaic GPU (`mosaic_*`); `choice.choose` says which, with what configuration, and why. Weights are read as layout.py
says they are stored.
"""
