"""What a denoiser is, one file a family: where its layers are, what reads text, and what one step computes."""
