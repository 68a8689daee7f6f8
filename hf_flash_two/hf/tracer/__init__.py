"""Hand-written attention, run by `flash_attention`."""
