"""What every stage shares: the recipe, the artifact, the run directory, the endpoint, processes, hardware, errors.

Nothing here imports torch, transformers, SGLang or aiohttp, so that every verb starts in a fraction of a second.
"""
