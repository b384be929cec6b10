"""How fast a bundle runs on this machine, against the card's FLOPs, the counted ones, and the roofline."""
