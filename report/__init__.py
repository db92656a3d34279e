"""From runs to a comparison: records, statistics, tables, pictures, and the log-mel baseline."""
