"""What a model is to us: where it comes from, how it is loaded, and what its parts are."""
