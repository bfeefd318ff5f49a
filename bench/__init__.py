"""What is measured, against whom, on which settings; results/ holds dated records."""
