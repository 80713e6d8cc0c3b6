"""What a step minimises: denoising on the generation stream, next tokens on the understanding stream."""
