//! To change a value that others change too.

use std::time::Duration;

use bytes::Bytes;
use nkv_core::Key;
use nkv_types::{AsKey, Deleted, Edit, Entry, IntoEdit, PutOptions, Result, Revision, UpdateStore, update, update_as};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};

use super::Client;

/// How long an update may take where the limit of a request is no limit.
const UPDATE_MAX: Duration = Duration::from_secs(86_400);

impl Client {
    /// Changes a value that others may change too: reads the key, writes what `edit` makes of it if it is still as it was
    /// read, and else begins again, after a random pause of at most 128 ms. Gives what the key holds then.
    ///
    /// `edit` gives the new value, or an [`Edit`](crate::Edit): [`Keep`](crate::Edit::Keep) writes nothing,
    /// [`Delete`](crate::Edit::Delete) deletes the key. It may be called more than once. A value that it gives has no TTL
    /// unless it gives one.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), after which it is not tried again; [`ErrorKind::Conflict`](crate::ErrorKind::Conflict) if others were faster until the
    /// time of one request was over. Each attempt is a read and a write.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let names = client.update("names", |old| match old {
    ///     Some(names) => [&names.value[..], b",kitchen"].concat(),
    ///     None => b"kitchen".to_vec(),
    /// });
    /// println!("{:?}", names.await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn update<E: IntoEdit>(
        &self,
        key: impl AsKey,
        mut edit: impl FnMut(Option<&Entry>) -> E,
    ) -> Result<Option<Entry>> {
        update(&Bounded::new(self), &*key.as_key()?, |old| Ok(edit(old).into_edit())).await
    }

    /// The same with values that are JSON.
    ///
    /// # Errors
    ///
    /// Those of [`update`](Self::update), and [`ErrorKind::Json`](crate::ErrorKind::Json) if the value is not the JSON of a `T`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use nkv_client::Edit;
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let visits = client.update_as("visits", |old: Option<u64>| old.unwrap_or(0) + 1).await?;
    /// println!("{visits:?}");
    ///
    /// let left = client.update_as("tickets", |left: Option<u32>| match left {
    ///     None | Some(0) => Edit::Keep,
    ///     Some(left) => Edit::put(left - 1),
    /// });
    /// println!("{:?}", left.await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn update_as<T: Serialize + DeserializeOwned, E: Into<Edit<T>>>(
        &self,
        key: impl AsKey,
        edit: impl FnMut(Option<T>) -> E,
    ) -> Result<Option<T>> {
        update_as(&Bounded::new(self), &*key.as_key()?, edit).await
    }
}

/// A client that has the time of one request for all that an update takes.
struct Bounded<'a> {
    client: &'a Client,
    deadline: Instant,
}

impl<'a> Bounded<'a> {
    fn new(client: &'a Client) -> Self {
        let now = Instant::now();
        // A request may be given more time than there is.
        let deadline = now.checked_add(client.request_timeout).unwrap_or_else(|| now + UPDATE_MAX);
        Bounded { client, deadline }
    }

    fn rest(&self) -> Client {
        self.client.with_request_timeout(self.deadline.saturating_duration_since(Instant::now()))
    }
}

impl UpdateStore for Bounded<'_> {
    async fn read(&self, key: &Key) -> Result<Option<Entry>> {
        self.rest().get(key).await
    }

    async fn write(&self, key: &Key, value: Bytes, options: PutOptions) -> Result<Revision> {
        self.rest().put_with(key, value, options).await
    }

    async fn delete(&self, key: &Key, if_revision: Revision) -> Result<Deleted> {
        self.rest().delete_if(key, if_revision).await
    }

    async fn pause(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        if end >= self.deadline {
            return false;
        }
        sleep_until(end).await;
        true
    }
}
