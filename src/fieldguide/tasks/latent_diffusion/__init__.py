"""Latent diffusion: text-to-image and text-to-video with pipelines of diffusers, and the training of their networks.

diffusion_pipeline.py    the networks of a pipeline, loaded from a folder or a single file
prompt_encoding.py       prompts as each family reads them
latent_sampling.py       denoising of latents
generation.py            images of prompts, from images, within masks
video_generation.py      videos of prompts
latent_examples.py       images and captions as latents and states of texts
text_to_image.py         the task
"""
