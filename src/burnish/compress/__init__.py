"""Quantizers, quantized linears and their file formats. Import the module that is needed; this file imports nothing."""
