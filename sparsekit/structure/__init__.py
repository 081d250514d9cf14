"""Plain data that all rooms share: groups, plans, places, masks, curves, and the counting of MACs and params."""
