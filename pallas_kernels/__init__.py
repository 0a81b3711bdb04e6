"""GPU kernels in Pallas: plain arrays in, plain arrays out. They know nothing of the library that calls them.

`lut_product.lut_product` is the product. It runs on one of five kernels, written for Pallas-Triton (`triton_*`) or for
Mosaic GPU (`mosaic_*`); `choice.choose` says which one, with what configuration, and why. The kernels read weights as
they are stored, in the layout of layout.py.
"""
