"""The machine and the terminal: devices, processes, launchers, the console."""
