"""From images to numbers: features, statistics, distances and references."""
