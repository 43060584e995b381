"""From a finished run to a folder that scores by itself."""
