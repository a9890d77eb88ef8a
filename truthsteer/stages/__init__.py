"""The stages, one file and one public `run` each. They never import each other; `pipeline` hands on what they make."""
