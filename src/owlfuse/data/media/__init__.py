"""Pictures and videos: opened within limits, cut into tiles and frames, made into pixels."""
