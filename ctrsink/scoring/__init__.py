"""Files of requests of any size, scored block by block into a folder of parts."""
