"""`tuneship docker`: our images, built and run through the engine's API, with the plain command beside it."""
