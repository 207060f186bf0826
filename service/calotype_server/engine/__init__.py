"""The engine: everything that imports torch and diffusers, behind the small protocol of `engine.protocol`."""
