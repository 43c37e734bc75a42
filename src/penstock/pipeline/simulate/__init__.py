"""What a schedule would take: costs in, a timeline with its bubbles, memory and messages out."""
