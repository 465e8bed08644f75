"""What each host function of csrc/cuda must compute, case by case, against float64."""
