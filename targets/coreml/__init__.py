"""Core ML: lowering to .mlpackage, and an interpreter that runs it anywhere."""
