"""What we add inside SGLang, through its own plugin entry points only.

Active only in engines that our launcher started (`TUNESHIP_ENGINE=1`): installing tuneship changes nobody's servers.
"""
