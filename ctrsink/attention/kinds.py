"""What a position of a sequence of text is: `prefix  (text feedback sink) ... (text)`; PAD is of padded forms alone."""

PAD, PREFIX, TEXT, FEEDBACK, SINK = range(5)
