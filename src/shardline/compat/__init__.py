"""Other packages' names over the public calls of the engine. No other room knows that they exist."""
