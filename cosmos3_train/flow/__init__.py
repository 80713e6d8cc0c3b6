"""The mathematics of denoising: pure functions of tensors and a table. Knows no model and no data."""
