"""Images to activation ranges, and a float32 model to one with Q/DQ nodes."""
