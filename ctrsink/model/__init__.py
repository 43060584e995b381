"""The CTR model: sinks, inter-sink bias, attention, readout, head."""
