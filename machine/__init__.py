"""The machine below: devices and their memory, fast kernels, several processes, files that are written whole."""
