"""From files to the data x and back: images, latents on disk, the VAE, the loader."""
