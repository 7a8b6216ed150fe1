"""Other people's files: from the Hub, opened as data, under our names, and as starts of runs."""
