//! Enums whose values have metric labels, and counters by label.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

/// An enum with a fixed set of values and a fixed name for each value.
pub trait Label: Copy + 'static {
    /// All values, in the order of [`Label::index`].
    const ALL: &'static [Self];
    /// The value's name in metrics, logs and the API.
    fn as_str(self) -> &'static str;
    /// The value's position in [`Label::ALL`].
    fn index(self) -> usize;

    /// The value with this name.
    fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|value| value.as_str() == name)
    }
}

/// Declares an enum with a name for each value: `Refused => "refused"`.
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
    /// Adds one to the counter of `label`.
    pub fn count(&self, label: L) {
        self.add(label, 1);
    }

    /// Adds to the counter of `label`.
    pub fn add(&self, label: L, number: u64) {
        self.counts[label.index()].fetch_add(number, Ordering::Relaxed);
    }

    /// The count of `label` so far.
    pub fn of(&self, label: L) -> u64 {
        self.counts[label.index()].load(Ordering::Relaxed)
    }

    /// The sum of all counters.
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
    fn each_label_has_its_own_counter() {
        let tally = Tally::<Fruit>::default();
        tally.count(Fruit::Pear);
        tally.count(Fruit::Pear);
        tally.count(Fruit::Apple);
        let counts: Vec<_> = Fruit::ALL.iter().map(|&fruit| (fruit.as_str(), tally.of(fruit))).collect();
        assert_eq!(counts, [("apple", 1), ("pear", 2)]);
        assert_eq!(tally.total(), 3);
    }
}
