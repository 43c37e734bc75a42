"""A machine that plays any course of events on a small engine, which several laws play: requests, what they should say,
and what is asserted meanwhile."""
