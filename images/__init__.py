"""Image data sets: found, listed, decoded, kept; the files of CIFAR."""
