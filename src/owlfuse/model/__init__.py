"""The model: a vision backbone, a connector, a fusion and an LLM, with what of each is trained."""
