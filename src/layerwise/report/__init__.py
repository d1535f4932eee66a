"""What people look at: bar charts as text, pictures, one HTML file. Tables on the screen are the command line's."""

from .bars import bar_chart
from .html import html_report
from .plots import plot_sparsities

__all__ = ["bar_chart", "html_report", "plot_sparsities"]
