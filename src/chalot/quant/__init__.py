"""Numbers to codes: schemes, grids, packing. Knows no files and no models; numpy only."""
