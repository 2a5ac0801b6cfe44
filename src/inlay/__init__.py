"""inlay: adapt frozen foundation models with any parameter-efficient method."""
