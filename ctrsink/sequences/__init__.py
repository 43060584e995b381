"""What every family's sequences share: where they are cut, columns that lie one behind another, the batch."""
