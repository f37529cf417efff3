"""Files, processes, devices, tasks and the terminal: what every stage runs on."""
