"""What a run would need and what a mixture would draw, worked out before anything is trained."""
