"""One module a log format. Each opens a folder read-only and yields episodes; nothing here writes or decodes video."""
