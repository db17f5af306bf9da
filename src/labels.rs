//! Enums whose names are metric labels, and counters for them.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

/// An enum of known size with a fixed name for each value.
pub trait Label: Copy + 'static {
    /// Every value, in the order of [`Label::index`].
    const ALL: &'static [Self];
    /// The name in metrics, logs and the API.
    fn as_str(self) -> &'static str;
    /// Position in [`Label::ALL`].
    fn index(self) -> usize;
}

/// Declares an enum whose values have one name each: `Refused => "refused"`.
#[macro_export]
macro_rules! label_enum {
    ($(#[$meta:meta])* $vis:vis enum $name:ident { $($(#[$doc:meta])* $value:ident => $label:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        $vis enum $name { $($(#[$doc])* $value,)+ }

        impl $crate::labels::Label for $name {
            const ALL: &'static [Self] = &[$(Self::$value,)+];

            fn as_str(self) -> &'static str {
                match self { $(Self::$value => $label,)+ }
            }

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

/// One counter for each value of a label.
#[derive(Debug)]
pub struct Tally<L> {
    counts: Box<[AtomicU64]>,
    label: PhantomData<L>,
}

impl<L: Label> Default for Tally<L> {
    fn default() -> Self {
        Self { counts: L::ALL.iter().map(|_| AtomicU64::new(0)).collect(), label: PhantomData }
    }
}

impl<L: Label> Tally<L> {
    /// Counts one.
    pub fn count(&self, label: L) {
        self.counts[label.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// How many were counted so far.
    pub fn of(&self, label: L) -> u64 {
        self.counts[label.index()].load(Ordering::Relaxed)
    }

    /// The sum over all labels.
    pub fn total(&self) -> u64 {
        self.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    label_enum! {
        enum Fruit { Apple => "apple", Pear => "pear", }
    }

    #[test]
    fn each_label_is_counted_apart() {
        let tally = Tally::<Fruit>::default();
        tally.count(Fruit::Pear);
        tally.count(Fruit::Pear);
        tally.count(Fruit::Apple);
        let counts: Vec<_> = Fruit::ALL.iter().map(|&fruit| (fruit.as_str(), tally.of(fruit))).collect();
        assert_eq!(counts, [("apple", 1), ("pear", 2)]);
        assert_eq!(tally.total(), 3);
    }
}
