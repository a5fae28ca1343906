#![doc = include_str!("../README.md")]

#[cfg(feature = "engine")]
pub mod engine;
pub mod fencing;
#[cfg(feature = "engine")]
pub mod histories;
pub mod notifier;
pub mod persist;
#[cfg(feature = "port")]
pub mod port;
pub mod script;

/// What the conformance macros have in common: one test per line, or a table of the lines.
#[doc(hidden)]
#[macro_export]
macro_rules! __conformance {
    (tests $module:ident $harness:expr; $($line:ident)*) => {
        $(
            #[test]
            fn $line() {
                $crate::$module::$line(&$harness);
            }
        )*
    };
    (table $module:ident $harness:ident; $($line:ident)*) => {
        vec![$((stringify!($line), $line as fn(&$harness))),*]
    };
}
