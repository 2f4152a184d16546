# Addresses, ports and networks as types that compute, so that a mistake is found where it is written. Nothing here is
# stricter than the programs themselves.
{ lib }:
let
  isPort = text: builtins.match "[0-9]{1,5}" text != null && lib.toIntBase10 text <= 65535;
  isOctet = text: builtins.match "0|[1-9][0-9]{0,2}" text != null && lib.toIntBase10 text <= 255;
  octets = lib.splitString ".";
  isV4 = text: lib.length (octets text) == 4 && lib.all isOctet (octets text);
  number = hex: (fromTOML "x = 0x${hex}").x;

  # An IPv6 address as its eight numbers; null where it is none.
  groups =
    text:
    let
      halves = lib.splitString "::" text;
      words = half: if half == "" then [ ] else lib.concatMap word (lib.splitString ":" half);
      # The last two groups may be an IPv4 address.
      word =
        text:
        if isV4 text then
          let
            part = lib.elemAt (map lib.toIntBase10 (octets text));
          in
          [
            (part 0 * 256 + part 1)
            (part 2 * 256 + part 3)
          ]
        else if builtins.match "[0-9a-fA-F]{1,4}" text != null then
          [ (number text) ]
        else
          [ null ];
      before = words (lib.head halves);
      after = lib.concatMap words (lib.tail halves);
      missing = 8 - lib.length before - lib.length after;
      right = if lib.length halves == 1 then missing == 0 else lib.length halves == 2 && missing > 0;
    in
    if right && !lib.elem null (before ++ after) then
      before ++ lib.replicate missing 0 ++ after
    else
      null;

  # Whether nothing is set after the first `length` bits of parts that have `width` bits each.
  isTruncated =
    width: length: parts:
    lib.all (x: x) (
      lib.imap0 (
        index: part:
        let
          kept = lib.max 0 (lib.min width (length - index * width));
          block = lib.foldl' (x: _: x * 2) 1 (lib.range 1 (width - kept));
        in
        part / block * block == part
      ) parts
    );
  isNetwork =
    text:
    let
      split = builtins.match "([^/]+)/(0|[1-9][0-9]{0,2})" text;
      address = lib.elemAt split 0;
      length = lib.toIntBase10 (lib.elemAt split 1);
    in
    split != null
    && (
      if isV4 address then
        length <= 32 && isTruncated 8 length (map lib.toIntBase10 (octets address))
      else
        groups address != null && length <= 128 && isTruncated 16 length (groups address)
    );

  split = builtins.match "(.+):([0-9]+)";
  # Of "192.0.2.1:443" or "[2001:db8::1]:443".
  hostOf = text: lib.removeSuffix "]" (lib.removePrefix "[" (lib.elemAt (split text) 0));
  portOf = text: lib.toIntBase10 (lib.elemAt (split text) 1);
  isBracketed = text: lib.hasPrefix "[" text && lib.hasInfix "]:" text;
  isListener =
    text:
    split text != null
    && isPort (lib.elemAt (split text) 1)
    && (isBracketed text || isV4 (hostOf text));
  isEndpoint = text: isListener text && (!isBracketed text || groups (hostOf text) != null);
  isWildcard = text: hostOf text == "0.0.0.0" || groups (hostOf text) == lib.replicate 8 0;
  checked =
    description: check:
    lib.types.addCheck lib.types.str check
    // {
      inherit description;
    };
in
{
  inherit portOf;

  isLoopback =
    text:
    lib.hasPrefix "127." (hostOf text)
    || lib.hasPrefix "::ffff:127." (hostOf text)
    || groups (hostOf text) == lib.replicate 7 0 ++ [ 1 ];

  # Whether two programs that listen there get into each other's way.
  collide =
    one: other:
    portOf one != 0
    && portOf one == portOf other
    && (hostOf one == hostOf other || isWildcard one || isWildcard other);

  types = {
    listener = checked "address and port to listen on, such as \"0.0.0.0:443\" or \"[::]:443\"" isListener;
    endpoint = checked "address and port, such as \"198.51.100.7:41641\" or \"[2001:db8::7]:41641\"" isEndpoint;
    network = checked "network without bits after its prefix, such as \"192.168.1.0/24\"" isNetwork;
  };
}
